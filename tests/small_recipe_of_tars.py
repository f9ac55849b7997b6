"""A recipe that trains on two sets of tars as they were found."""

RECIPE = """
model:
  class_path: lightning_modules.pretrain.PretrainModule
  init_args:
    model: {{preset: eva02_at_tiny, embed_dim: 32, num_frames: 4, image_size: 32}}
    loss: {{class_path: lightning_modules.losses.InfoNCELoss, init_args: {{temperature: null}}}}
    optimizer: {{lr: 1.0e-3}}
data:
  class_path: datamodules.pretrain.PretrainDataModule
  init_args:
    train: [{tars}, {checked}]
    global_batch_size: 6
    num_frames: 4
    image_size: 32
    num_workers: 2
    decoder: decord
    decode_timeout_s: 1.5
    max_fault_rate: 1.0
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_progress_bar: false
"""
