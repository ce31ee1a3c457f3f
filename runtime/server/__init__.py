"""`edgetune serve`: a bundle over HTTP, with OpenAI's endpoints and vLLM's for adapters. Needs
`edgetune[serve]`.
"""
