"""The other benchmarks' metrics by hand, label-order traps included."""

import pytest
import torch

from lightning_modules.metrics import (
    ActionAccuracy,
    CharadesMAP,
    EgoMCQAccuracy,
    TextVideoRecall,
)
from lightning_modules.metrics.functional.average_precision import charades_map
from lightning_modules.metrics.functional.choice import choice_correct, egomcq_accuracy
from lightning_modules.metrics.functional.recall import recall_summary, retrieval_ranks
from lightning_modules.metrics.functional.recognition import (
    action_hits,
    in_top_k,
    marginal_probabilities,
)


class TestEgoMCQ:
    def test_type_1_is_inter_and_type_2_is_intra(self):
        correct, types = torch.tensor([True, True, True, False]), torch.tensor([1, 1, 2, 2])
        assert egomcq_accuracy(correct, types) == {
            "inter": 1.0,
            "num_inter": 2,
            "intra": 0.5,
            "num_intra": 2,
        }

    def test_the_first_of_equal_choices_is_taken(self):
        similarity = torch.tensor([[0.1, 0.7, 0.7], [0.7, 0.1, 0.7]])
        assert choice_correct(similarity, torch.tensor([1, 2])).tolist() == [True, False]

    def test_a_question_counts_once(self):
        metric = EgoMCQAccuracy()
        similarity, types = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([1, 1])
        metric.update(similarity, torch.tensor([0, 1]), types, torch.tensor([5, 6]))
        metric.update(similarity, torch.tensor([0, 0]), types, torch.tensor([5, 5]))
        padding = torch.tensor([False, False])
        metric.update(similarity, torch.tensor([1, 1]), types, torch.tensor([7, 8]), padding)
        result = metric.compute()
        assert (result["inter"], result["num_inter"], result["num_intra"]) == (50.0, 2, 0)

    @pytest.mark.parametrize(
        ("similarity", "answer", "message"),
        [
            (torch.ones(2, 5), torch.tensor([0]), "they must be"),
            (torch.ones(1, 5), torch.tensor([5]), "must lie in"),
            (torch.full((1, 5), torch.nan), torch.tensor([0]), "5 NaN"),
        ],
    )
    def test_bad_input_is_refused(self, similarity, answer, message):
        with pytest.raises(ValueError, match=message):
            choice_correct(similarity, answer)

    def test_an_unknown_type_is_refused(self):
        with pytest.raises(ValueError, match=r"question types \[0\]"):
            egomcq_accuracy(torch.tensor([True]), torch.tensor([0]))


class TestCharades:
    def test_by_hand(self):
        # class 0: order 0, 2, 1; hits at places 1 and 3; class 1: hit in place 2
        scores = torch.tensor([[0.9, 0.5], [0.1, 0.7], [0.5, 0.6]])
        targets = torch.tensor([[1, 0], [1, 0], [0, 1]])
        result = charades_map(scores, targets)
        assert result.per_class.tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 2])
        assert result.map == pytest.approx((5 / 6 + 1 / 2) / 2)

    def test_unlabelled_videos_rank_last(self):
        scores = torch.tensor([[0.9], [0.5]])
        result = charades_map(scores, torch.tensor([[0], [1]]))
        assert (result.map, result.num_unlabelled) == (1.0, 1)

    def test_a_class_without_a_positive_is_left_out_and_counted(self):
        result = charades_map(torch.rand(2, 3), torch.tensor([[1, 0, 0], [1, 0, 0]]))
        assert (result.map, result.num_excluded_classes) == (1.0, 2)
        assert result.per_class.isnan().tolist() == [False, True, True]

    def test_ties_rank_by_index_of_the_video(self):
        result = charades_map(torch.zeros(3, 2), torch.tensor([[0, 1], [1, 0], [0, 1]]))
        assert result.per_class.tolist() == pytest.approx([1 / 2, (1 + 2 / 3) / 2])
        # videos without a label do not count as ties in front
        assert charades_map(torch.zeros(2, 1), torch.tensor([[0], [1]])).map == 1.0

    def test_videos_count_once_in_the_order_of_their_ids(self):
        metric = CharadesMAP()
        metric.update(torch.zeros(1, 2), torch.tensor([[0, 1]]), torch.tensor([9]))
        metric.update(torch.zeros(2, 2), torch.tensor([[1, 0], [0, 1]]), torch.tensor([3, 9]))
        # order 3, 9: class 0 hit first, class 1 hit second
        assert metric.compute()["map"] == pytest.approx(100 * (1 + 1 / 2) / 2)
        assert metric.compute()["num_videos"] == 2

    @pytest.mark.parametrize(
        ("scores", "targets", "message"),
        [
            (torch.ones(2, 3), torch.ones(3, 2), "both must be"),
            (torch.full((1, 1), torch.nan), torch.ones(1, 1), "NaN"),
            (torch.ones(1, 1), torch.full((1, 1), 2), "0 or 1"),
        ],
    )
    def test_bad_input_is_refused(self, scores, targets, message):
        with pytest.raises(ValueError, match=message):
            charades_map(scores, targets)


class TestRecognition:
    # actions (verb, noun): 0 = (0, 0), 1 = (0, 1), 2 = (1, 1)
    verbs, nouns = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])

    def test_marginals_are_sums_of_probabilities(self):
        logits = torch.tensor([[0.2, 0.3, 0.5]]).log()
        verb = marginal_probabilities(logits, self.verbs, 2)
        noun = marginal_probabilities(logits, self.nouns, 3)
        torch.testing.assert_close(verb, torch.tensor([[0.5, 0.5]]).double(), atol=1e-7, rtol=0)
        torch.testing.assert_close(
            noun, torch.tensor([[0.2, 0.8, 0.0]]).double(), atol=1e-7, rtol=0
        )

    def test_verb_right_though_action_wrong(self):
        logits = torch.tensor([[0.35, 0.25, 0.4]]).log()
        hits = action_hits(logits, torch.tensor([0]), self.verbs, self.nouns)
        assert {name: hit.item() for name, hit in hits.items() if name.endswith("1")} == {
            "action_top1": False,
            "verb_top1": True,
            "noun_top1": False,
        }
        assert hits["action_top5"].item()

    def test_top_k_counts_ties_by_class(self):
        scores = torch.tensor([[0.5, 0.5, 0.5, 0.9]])
        inside = [in_top_k(scores, torch.tensor([c]), 2).item() for c in range(4)]
        assert inside == [True, False, False, True]

    def test_the_class(self):
        metric = ActionAccuracy(self.verbs, self.nouns)
        logits = torch.tensor([[0.35, 0.25, 0.4], [0.1, 0.2, 0.7]]).log()
        metric.update(logits, torch.tensor([0, 2]), torch.tensor([0, 1]))
        metric.update(logits, torch.tensor([0, 0]), torch.tensor([0, 1]))  # the same clips again
        result = metric.compute()
        assert (result["action_top1"], result["verb_top1"], result["noun_top1"]) == (50, 100, 50)
        assert result["num_clips"] == 2

    def test_bad_input_is_refused(self):
        with pytest.raises(ValueError, match="they must be"):
            marginal_probabilities(torch.ones(1, 2), self.verbs, 2)
        with pytest.raises(ValueError, match="must lie in"):
            marginal_probabilities(torch.ones(1, 3), self.verbs, 1)
        with pytest.raises(ValueError, match="NaN"):
            action_hits(torch.full((1, 3), torch.nan), torch.tensor([0]), self.verbs, self.nouns)


class TestRecall:
    def test_by_hand(self):
        queries, items = torch.eye(3), torch.tensor([[1.0, 0, 0], [2, 1, 0], [3, 2, 1]])
        ranks = retrieval_ranks(queries, items, torch.tensor([0, 1, 2]))
        assert ranks.tolist() == [3, 2, 1]
        summary = recall_summary(ranks)
        assert summary == {"r1": pytest.approx(1 / 3), "r5": 1.0, "r10": 1.0, "mdr": 2.0}

    def test_the_median_of_an_even_number_is_the_mean_of_two(self):
        assert recall_summary(torch.tensor([1, 2, 5, 100]))["mdr"] == 3.5

    def test_ties_rank_by_index(self):
        ranks = retrieval_ranks(torch.ones(3, 1), torch.ones(3, 1), torch.tensor([0, 1, 2]))
        assert ranks.tolist() == [1, 2, 3]

    def test_the_best_of_several_texts_counts(self):
        queries, items = torch.ones(2, 1), torch.tensor([[1.0], [3.0], [2.0]])
        assert retrieval_ranks(queries, items, torch.tensor([[0, 2], [0, -1]])).tolist() == [2, 3]

    def test_several_texts_a_video_and_strangers(self):
        metric = TextVideoRecall()
        metric.update(torch.eye(3)[[2, 0, 1]], index=torch.tensor([12, 10, 11]))
        text = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 1, 0.5], [1, 1, 1]])
        # text 2 belongs to video 12 but looks like 11; text 3 belongs to a video that is not there
        metric.update(text, torch.tensor([0, 1, 2, 3]), video=torch.tensor([10, 11, 12, 99]))
        mask = torch.tensor([False])
        metric.update(torch.ones(1, 3), torch.tensor([77]), mask=mask)
        result = metric.compute()
        assert result["t2v_r1"] == pytest.approx(100 * 2 / 3)
        assert result["v2t_r1"] == 100.0
        assert (result["num_texts"], result["num_texts_without_video"]) == (3, 1)
        assert (result["num_videos"], result["num_videos_without_text"]) == (3, 0)

    @pytest.mark.parametrize("partner", [torch.tensor([0, 3]), torch.tensor([[-1], [0]])])
    def test_a_missing_partner_is_refused(self, partner):
        with pytest.raises(ValueError, match="needs a partner"):
            retrieval_ranks(torch.ones(2, 1), torch.ones(3, 1), partner)

    def test_shapes_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="do not fit"):
            retrieval_ranks(torch.ones(2, 1), torch.ones(3, 2), torch.tensor([0, 0]))

    def test_texts_without_any_video_are_refused(self):
        metric = TextVideoRecall()
        metric.update(torch.ones(1, 2), torch.tensor([0]), video=torch.tensor([3]))
        with pytest.raises(ValueError, match="none of the texts"):
            metric.compute()
