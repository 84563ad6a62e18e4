"""Methods compared: many runs on one base, each at a learning rate that was piloted for it, with several seeds.

plan.py says what the runs are, rates.py which learning rate a method gets, runner.py runs them side by side.
"""
