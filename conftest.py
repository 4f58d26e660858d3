"""Doctests of an optional integration run where its extra is installed; its tests say why they are skipped."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("transformers") else ["pyquantattn/integrations/transformers"]
