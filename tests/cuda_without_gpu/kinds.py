"""A recipe of each kind of step, and what it is."""

KINDS = {
    "eva02_at_base_egoclip": "B, InfoNCE",
    "eva02_at_large_egoclip": "L, InfoNCE",
    "egovlp_base_egoclip": "B, EgoNCE",
    "eva02_at_base_sms": "B, 16 frames, SMS",
    "charades_ego/eva02_at_base": "B, 16 frames, hard labels, LAMB",
    "eva02_at_base_ek100": "B, 16 frames, recognition",
}
