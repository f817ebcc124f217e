"""hk.shift_report: how hooks move the tokens of many prompts, and why."""
