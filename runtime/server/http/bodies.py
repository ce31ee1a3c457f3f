"""What each request may hold, as JSON schemas: the validation and `/openapi.json` both read these
tables.
"""

from __future__ import annotations

from edgetune.runtime.server.http.json_body import Schema, either, obj, optional, unsupported

MODEL_NAME = {
    "type": "string",
    "minLength": 1,
    "maxLength": 256,
    "description": "An adapter's name, or the base model's.",
}
TEXT_LIMIT = 4_000_000
"""Characters of one text; the context is checked in tokens later."""
TEXT = {"type": "string", "maxLength": TEXT_LIMIT}
TOKEN = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
USER = optional("string", maxLength=256, description="Who asks; written to the log, nothing else.")
DEADLINE = optional(
    "number",
    exclusiveMinimum=0,
    maximum=86400,
    description="Seconds after which the answer is of no use (ours).",
)
CONTROL_TOKENS = optional(
    "string",
    enum=["text", "tokens"],
    description=(
        "What a control token is that a text of the request spells: text (characters), or tokens"
        " (itself); as the adapter was trained, where it is left out (ours)."
    ),
)
INPUTS = {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 2048}
SCHEMA_NAME = {"type": "string", "minLength": 1, "maxLength": 64}
FORMAT_KINDS = {
    "text": obj(("type",), type={"type": "string", "enum": ["text"]}),
    "json_object": obj(("type",), type={"type": "string", "enum": ["json_object"]}),
    "json_schema": obj(
        ("type", "json_schema"),
        type={"type": "string", "enum": ["json_schema"]},
        json_schema=obj(
            ("name", "schema"),
            name=SCHEMA_NAME,
            description=optional("string"),
            schema={"type": "object"},
            strict=optional("boolean", description="Always kept, whether asked for or not."),
        ),
    ),
}
RESPONSE_FORMAT = either({"type": "null"}, *FORMAT_KINDS.values())
SAMPLING: dict[str, Schema] = {
    "n": optional("integer", minimum=1, maximum=64),
    "temperature": optional("number", minimum=0, maximum=2),
    "top_p": optional("number", exclusiveMinimum=0, maximum=1),
    "top_k": optional(
        "integer", minimum=-1, maximum=2**31 - 1, description="0 or -1 is all (vLLM)."
    ),
    "min_p": optional("number", minimum=0, maximum=1, description="As vLLM's."),
    "repetition_penalty": optional("number", minimum=0.01, maximum=10, description="As vLLM's."),
    "frequency_penalty": optional("number", minimum=-2, maximum=2),
    "presence_penalty": optional("number", minimum=-2, maximum=2),
    "logit_bias": optional(
        "object",
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
        maxProperties=1024,
        description="Token id → what is added to its logit.",
    ),
    "seed": optional("integer", minimum=0, maximum=2**63 - 1),
    "stop": either(
        {"type": ["string", "null"], "minLength": 1, "maxLength": 1024},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": 1024},
            "maxItems": 16,
        },
    ),
    "confidence": optional(
        "boolean",
        description="How sure the answer is, with it: the probability that it is right (ours).",
    ),
    "max_tokens": optional("integer", minimum=1, maximum=2**31 - 1),
    "stream": optional("boolean"),
    "stream_options": {
        "type": ["object", "null"],
        "properties": {
            "include_usage": optional("boolean"),
            "include_obfuscation": optional("boolean", enum=[False]),
        },
        "additionalProperties": False,
    },
    "response_format": RESPONSE_FORMAT,
    "guided_regex": optional(
        "string", minLength=1, maxLength=65536, description="The answer matches it (vLLM)."
    ),
    "guided_grammar": optional(
        "string", minLength=1, maxLength=65536, description="A Lark grammar (vLLM)."
    ),
    "user": USER,
    "deadline_s": DEADLINE,
}
CONTENT_PART = obj(("type", "text"), type={"type": "string", "enum": ["text"]}, text=TEXT)
FUNCTION_NAME = {"type": "string", "minLength": 1, "maxLength": 64}
TOOL_CALL = obj(
    ("id", "type", "function"),
    id={"type": "string", "maxLength": 128},
    type={"type": "string", "enum": ["function"]},
    function=obj(("name", "arguments"), name=FUNCTION_NAME, arguments=TEXT),
)
TOOL = obj(
    ("type", "function"),
    type={"type": "string", "enum": ["function"]},
    function=obj(
        ("name",),
        name=FUNCTION_NAME,
        description=optional("string"),
        parameters=optional("object"),
        strict=optional("boolean"),
    ),
)
CHOSEN_TOOL = obj(
    ("type", "function"),
    type={"type": "string", "enum": ["function"]},
    function=obj(("name",), name=FUNCTION_NAME),
)
MESSAGE = obj(
    ("role",),
    role={"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
    content=either(
        {**TEXT, "type": ["string", "null"]},
        {"type": "array", "items": CONTENT_PART, "minItems": 1, "maxItems": 256},
    ),
    name=optional("string", maxLength=64),
    refusal=unsupported("models here do not refuse in a field of its own."),
    audio=unsupported("text only."),
    annotations=optional("array", maxItems=0),
    function_call=unsupported("use tool_calls."),
    tool_calls=optional("array", items=TOOL_CALL, maxItems=128),
    tool_call_id=optional("string", maxLength=128),
)
NO_STORE = "nothing is kept on this server."
CHAT = obj(
    ("model", "messages"),
    model=MODEL_NAME,
    messages={"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": 1024},
    **SAMPLING,
    control_tokens=CONTROL_TOKENS,
    max_completion_tokens=optional("integer", minimum=1, maximum=2**31 - 1),
    logprobs=optional("boolean"),
    top_logprobs=optional("integer", minimum=0, maximum=20),
    safety_identifier=USER,
    store=optional("boolean", enum=[False], description=f"Only false: {NO_STORE}"),
    service_tier=optional("string", enum=["auto", "default"]),
    metadata=unsupported(NO_STORE),
    modalities=optional(
        "array", items={"type": "string", "enum": ["text"]}, minItems=1, maxItems=1
    ),
    audio=unsupported("text only."),
    prediction=unsupported("predicted outputs are not used."),
    reasoning_effort=unsupported("there is no reasoning to set."),
    verbosity=unsupported("ask for it in the prompt."),
    web_search_options=unsupported("there is no web search."),
    tools=optional(
        "array", items=TOOL, maxItems=128, description="Where the bundle's chat template has tools."
    ),
    tool_choice=either(optional("string", enum=["none", "auto", "required"]), CHOSEN_TOOL),
    parallel_tool_calls=optional(
        "boolean", enum=[True], description="Only true: a model may call several at once."
    ),
    functions=unsupported("use tools."),
    function_call=unsupported("use tool_choice."),
)
COMPLETIONS = obj(
    ("model", "prompt"),
    model=MODEL_NAME,
    prompt=either(
        {"type": "string", "minLength": 1, "maxLength": TEXT_LIMIT},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": TEXT_LIMIT},
            "minItems": 1,
            "maxItems": 128,
        },
        {"type": "array", "items": TOKEN, "minItems": 1, "maxItems": 262_144},
        {
            "type": "array",
            "items": {"type": "array", "items": TOKEN, "minItems": 1, "maxItems": 262_144},
            "minItems": 1,
            "maxItems": 128,
        },
    ),
    **SAMPLING,
    logprobs=optional("integer", minimum=0, maximum=20),
    add_special_tokens=optional(
        "boolean", description="Whether the tokenizer adds its own (vLLM); default true."
    ),
    control_tokens=CONTROL_TOKENS,
    echo=optional("boolean", enum=[False], description="Only false: the prompt is not repeated."),
    best_of=optional("integer", enum=[1], description="Only 1."),
    suffix=unsupported("text is only continued, not filled in."),
)
TRUNCATE = optional(
    "integer",
    enum=[-1],
    description="-1 cuts to what the model was trained with; else too long is an error (vLLM).",
)
PAIRS = {
    "type": "array",
    "items": {"type": "array", "items": TEXT, "minItems": 2, "maxItems": 2},
    "minItems": 1,
    "maxItems": 2048,
}
CLASSIFY = obj(
    ("model", "input"),
    model=MODEL_NAME,
    input=either(
        TEXT,
        INPUTS,
        PAIRS,
        description="Texts, or pairs of texts for an adapter that reads two (ours).",
    ),
    truncate_prompt_tokens=TRUNCATE,
    threshold=optional(
        "number",
        minimum=0,
        maximum=1,
        description=(
            "A label of a lower score is null; the adapter's own threshold, where it is left out;"
            " 0: every label counts (ours)."
        ),
    ),
    use_activation=optional("boolean", enum=[True]),
    control_tokens=CONTROL_TOKENS,
    user=USER,
    deadline_s=DEADLINE,
)
WORDS = {
    "type": "array",
    "items": {"type": "string", "minLength": 1, "maxLength": 4096},
    "minItems": 1,
    "maxItems": 8192,
}
TAG = obj(
    ("model", "input"),
    model=MODEL_NAME,
    input=either(TEXT, INPUTS, {"type": "array", "items": WORDS, "minItems": 1, "maxItems": 2048}),
    truncate_prompt_tokens=TRUNCATE,
    control_tokens=CONTROL_TOKENS,
    user=USER,
    deadline_s=DEADLINE,
)
TRUNCATE_ANSWER = optional(
    "integer",
    enum=[-1],
    description=(
        "-1 keeps the end of prompt and answer that are longer than the context (a regression of"
        " two texts: cuts the longer text first, to what it was trained with); else too long is an"
        " error (vLLM)."
    ),
)
SCORE = obj(
    ("model", "text_1", "text_2"),
    model=MODEL_NAME,
    text_1=either(TEXT, INPUTS, description="Prompts of a reward adapter, or one for all answers."),
    text_2=either(
        TEXT,
        INPUTS,
        description=(
            "The answers to score: as many, or several to one prompt; 65,536 tokens in all."
        ),
    ),
    truncate_prompt_tokens=TRUNCATE_ANSWER,
    use_activation=optional(
        "boolean", enum=[False], description="Only false: scores are as the head gives them."
    ),
    control_tokens=CONTROL_TOKENS,
    user=USER,
    deadline_s=DEADLINE,
)
POOLING = obj(
    ("model",),
    model=MODEL_NAME,
    messages=optional(
        "array",
        items=MESSAGE,
        minItems=1,
        maxItems=1024,
        description="A conversation that ends with the answer to score.",
    ),
    input=either(
        {"type": "null"},
        TEXT,
        INPUTS,
        description="Texts to score as they stand, in place of messages.",
    ),
    encoding_format=optional("string", enum=["float"]),
    task=optional("string", enum=["classify"]),
    truncate_prompt_tokens=TRUNCATE_ANSWER,
    use_activation=optional(
        "boolean", enum=[False], description="Only false: scores are as the head gives them."
    ),
    control_tokens=CONTROL_TOKENS,
    user=USER,
    deadline_s=DEADLINE,
)
EMBEDDINGS = obj(
    ("model", "input"),
    model=MODEL_NAME,
    input=either(TEXT, INPUTS),
    encoding_format=optional("string", enum=["float", "base64"]),
    dimensions=unsupported("vectors keep the model's own length."),
    truncate_prompt_tokens=TRUNCATE,
    control_tokens=CONTROL_TOKENS,
    user=USER,
    deadline_s=DEADLINE,
)
NAME = {
    "type": "string",
    "minLength": 1,
    "maxLength": 128,
    "pattern": r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$",
    "description": "Letters, digits and ._:/@+-",
}
LOAD_ADAPTER = obj(
    ("lora_name", "lora_path"),
    lora_name=NAME,
    lora_path={
        "type": "string",
        "minLength": 1,
        "maxLength": 4096,
        "description": (
            "A PEFT folder inside a folder that the operator allowed (`--adapter-folder`)."
        ),
    },
    load_inplace=optional("boolean", description="Replace an adapter of that name."),
)
UNLOAD_ADAPTER = obj(
    ("lora_name",),
    lora_name=MODEL_NAME,
    lora_int_id=unsupported("adapters have names."),
    in_use=optional(
        "string",
        enum=["forget", "refuse", "wait"],
        description=(
            "Of an adapter that answers just now (ours): its texts go on without its name"
            " (default), 409, or wait for them."
        ),
    ),
    timeout_s=optional(
        "number",
        exclusiveMinimum=0,
        maximum=3600,
        description="How long to wait, then 409; default 30 (ours).",
    ),
)
BODIES: dict[str, Schema] = {
    "ChatRequest": CHAT,
    "CompletionRequest": COMPLETIONS,
    "ClassifyRequest": CLASSIFY,
    "TagRequest": TAG,
    "ScoreRequest": SCORE,
    "PoolingRequest": POOLING,
    "EmbeddingRequest": EMBEDDINGS,
    "LoadAdapterRequest": LOAD_ADAPTER,
    "UnloadAdapterRequest": UNLOAD_ADAPTER,
}
