"""Long2short (paper 2.4): shorter answers from a long-CoT model. `merge.py` needs no training; `selection.py` chooses responses
for shortest rejection sampling and for `dpo.py`; `rl.py` is the second RL phase; `plot.py` draws what the ways give.
"""
