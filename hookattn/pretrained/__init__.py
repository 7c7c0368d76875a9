"""From a name and a text to a model and its inputs: what transformers brings is imported where it is needed."""
