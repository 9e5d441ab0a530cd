"""Training on given data instead of samples: fine-tuning on conversations (`sft.py`) and on preference pairs
(`long2short/dpo.py`), both through the Megatron trainer. Read `run.py` first.
"""
