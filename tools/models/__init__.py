"""Small real language models for the demo, the evaluation and the tests, and what they are made of."""
