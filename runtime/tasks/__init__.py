"""A bundle is opened and answers: texts, labels, tags, scores."""
