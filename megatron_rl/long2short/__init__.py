"""Long2short (paper 2.4): shorter answers from a long-CoT model. `merge.py` needs no training; `selection.py` chooses responses
for shortest rejection sampling and for `dpo.py`. The fourth way, RL with the length reward, is a training config:
`rewards.length` and a small `rollout.max_response_tokens`.
"""
