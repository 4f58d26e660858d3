"""What a KV format costs on a model: accuracy against memory, with controls that can fail.

``pyquantattn-evaluate`` (``python -m pyquantattn.evaluation``) is the command; these are its parts:

- :mod:`~pyquantattn.evaluation.spec`: which format each layer gets;
- :mod:`~pyquantattn.evaluation.sequence`: one sequence whose attention reads quantised caches;
- :mod:`~pyquantattn.evaluation.tensor_level`: codec and attention-output error of given q, k, v;
- :mod:`~pyquantattn.evaluation.model_level`: teacher-forced decode and greedy decode of a language model;
- :mod:`~pyquantattn.evaluation.verdict`: controls, thresholds, words.

The specification of every number is docs/accuracy.md.
"""
