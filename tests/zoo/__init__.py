"""The fault zoo: real trainings under DDP with one planted fault each, and healthy ones that break naive rules.

    python -m tests.zoo run --out r.json      # every case, each on two processes
    python -m tests.zoo score r.json
    python -m tests.zoo table r.json          # the README's table

`training.Training` is a correct program; a case is that program with one method changed (faults_*.py, legal.py) or with
other settings (controls.py). A monitor is attached through an adapter (adapter.py; peers.py has others), and what it
said is held against the case's `Expect` (scoring.py).
"""
