"""Doctests of what needs an extra run where that extra is installed; its tests say why they are skipped."""

import importlib.util

NEEDS = {
    "pyquantattn/integrations/lm_eval.py": "lm_eval",
    "pyquantattn/integrations/transformers": "transformers",
    "pyquantattn/evaluation/charts.py": "matplotlib",
    "pyquantattn/evaluation/html_report.py": "matplotlib",
    "pyquantattn/evaluation/terminal.py": "rich",
}
collect_ignore = [path for path, module in NEEDS.items() if importlib.util.find_spec(module) is None]
