"""Chat templates by name, with the special tokens that each needs.

Each prints what the model family's own template prints and marks what the model writes with
`{% generation %}`, so that the loss mask comes from rendering.
"""

import hashlib
import re

from groundup.core.errors import ConfigError, closest

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- 'You may call these functions, one JSON object in <tool_call></tool_call> a call:' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first }}
{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'user' %}
{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- elif not loop.first %}
{{- raise_exception('a system message must come first') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# What Qwen 2.5 and 3 have in common: tools in the system message, calls, results.
QWEN_SYSTEM = """\
{%- if tools %}
{{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') }}
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and ' }}
{{- 'arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif system %}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content or '' %}
"""
QWEN_CALLS = """\
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '\\n' if content or not loop.first }}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
"""
OWN_SYSTEM = "{%- set system = messages[0].content if messages[0].role == 'system' else '' %}\n"

QWEN25 = f"""\
{{%- set system = messages[0].content if messages[0].role == 'system' else
    'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}}
{QWEN_SYSTEM}{{{{- '<|im_start|>assistant\\n' }}}}
{{%- generation %}}
{{{{- content }}}}
{QWEN_CALLS}{{%- endif %}}
"""

QWEN3_INSTRUCT = f"""\
{OWN_SYSTEM}{QWEN_SYSTEM}{{{{- '<|im_start|>assistant\\n' }}}}
{{%- generation %}}
{{{{- content }}}}
{QWEN_CALLS}{{%- endif %}}
"""

# Reasoning stays in the turns after the last question and is dropped from those before it.
QWEN3 = f"""\
{{%- set ns = namespace(last=-1) %}}
{{%- for message in messages %}}
{{%- if message.role == 'user' %}}{{%- set ns.last = loop.index0 %}}{{%- endif %}}
{{%- endfor %}}
{OWN_SYSTEM}{QWEN_SYSTEM}{{%- set reasoning = message.reasoning_content or '' %}}
{{%- if not reasoning and '</think>' in content %}}
{{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}}
{{%- set content = content.split('</think>')[-1].lstrip('\\n') %}}
{{%- endif %}}
{{{{- '<|im_start|>assistant\\n' }}}}
{{%- generation %}}
{{%- if loop.index0 > ns.last and (loop.last or reasoning) %}}
{{{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}}}
{{%- endif %}}
{{{{- content }}}}
{QWEN_CALLS}{{%- if enable_thinking is defined and not enable_thinking %}}
{{{{- '<think>\\n\\n</think>\\n\\n' }}}}
{{%- endif %}}
{{%- endif %}}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if tools %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nEnvironment: ipython\\n\\n' }}
{{- 'Given the following functions, please respond with a JSON for a function call with its ' }}
{{- 'proper arguments that best answers the given prompt.\\n\\nRespond in the format ' }}
{{- '{"name": function name, "parameters": dictionary of argument name and its value}. ' }}
{{- 'Do not use variables.\\n\\n' }}
{%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\\n\\n' }}{%- endfor %}
{{- messages[0].content | trim if messages[0].role == 'system' }}
{{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- generation %}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '{"name": "' + function.name + '", "parameters": ' + (function.arguments | tojson) + '}' }}
{%- else %}
{{- message.content | trim }}
{%- endfor %}
{{- '<|eot_id|>' }}
{%- endgeneration %}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Llama 3.1 and 3.2: a system message with dates, tools in the first user message.
LLAMA31 = """\
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{%- set first = 1 if messages[0].role == 'system' else 0 %}
{%- set tools = custom_tools if custom_tools is defined else tools %}
{%- set with_user = tools and (tools_in_user_message is not defined or tools_in_user_message) %}
{%- set listed = namespace(text='') %}
{%- for tool in tools or [] %}
{%- set listed.text = listed.text + (tool | tojson(indent=4)) + '\\n\\n' %}
{%- endfor %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Environment: ipython\\n' if tools }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' }}
{{- (date_string if date_string is defined else 'TODAY') + '\\n\\n' }}
{%- if tools and not with_user %}
{{- 'You have access to the following functions. To call a function, please respond with JSON ' }}
{{- 'for a function call.Respond in the format {"name": function name, "parameters": ' }}
{{- 'dictionary of argument name and its value}.Do not use variables.\\n\\n' + listed.text }}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- generation %}
{{- raise_exception('one call a message') if message.tool_calls and message.tool_calls[1:] }}
{%- for call in message.tool_calls or [] %}
{{- '{"name": "' + call.function.name + '", "parameters": ' }}
{{- (call.function.arguments | tojson) + '}' }}
{%- else %}
{{- message.content | trim }}
{%- endfor %}
{{- '<|eot_id|>' }}
{%- endgeneration %}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{{- (message.content | tojson) + '<|eot_id|>' }}
{%- elif not (loop.first and message.role == 'system') %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if with_user and loop.index0 == first %}
{{- 'Given the following functions, please respond with a JSON for a function call with its ' }}
{{- 'proper arguments that best answers the given prompt.\\n\\nRespond in the format ' }}
{{- '{"name": function name, "parameters": dictionary of argument name and its value}.' }}
{{- 'Do not use variables.\\n\\n' + listed.text }}
{%- endif %}
{{- message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA32 = LLAMA31.replace("'TODAY'", "strftime_now('%d %b %Y')")
LLAMA31 = LLAMA31.replace("'TODAY'", "'26 Jul 2024'")

MISTRAL = """\
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and loop.index0 == ns.last %}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + (system if loop.index0 == ns.last else '') + message.content + '[/INST]' }}
{%- elif message.role == 'assistant' %}
{%- generation %}
{%- if message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{{- (call.function | tojson) + (', ' if not loop.last else ']') }}
{%- endfor %}
{%- else %}
{{- ' ' + message.content }}
{%- endif %}
{{- eos_token }}
{%- endgeneration %}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + '}[/TOOL_RESULTS]' }}
{%- elif not loop.first %}
{{- raise_exception('a system message must come first') }}
{%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- set first = 1 if system else 0 %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<start_of_turn>model\\n' }}
{%- generation %}
{{- message.content | trim + '<end_of_turn>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif message.role == 'user' %}
{{- '<start_of_turn>user\\n' + (system if loop.index0 == first else '') }}
{{- message.content | trim + '<end_of_turn>\\n' }}
{%- elif message.role == 'system' and not loop.first %}
{{- raise_exception('a system message must come first') }}
{%- elif message.role == 'tool' %}
{{- raise_exception('this template has no tools') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

PLAIN = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- 'Assistant:' }}
{%- generation %}
{{- ' ' + message.content + eos_token }}
{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- message.role | capitalize + ': ' + message.content + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:' }}
{%- endif %}
"""

TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>")),
    "qwen2.5": (QWEN25, ("<|im_start|>", "<|im_end|>")),
    "qwen3": (QWEN3, ("<|im_start|>", "<|im_end|>")),
    "qwen3-instruct": (QWEN3_INSTRUCT, ("<|im_start|>", "<|im_end|>")),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "llama3.1": (LLAMA31, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "llama3.2": (LLAMA32, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": (
        MISTRAL,
        (
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
    ),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "plain": (PLAIN, ()),
}

# Tokens that end a turn in the templates of the field; the end of text does so everywhere.
ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>")


def template(name: str) -> tuple[str, tuple[str, ...]]:
    """Return a template by name and the special tokens it needs."""
    if name not in TEMPLATES:
        raise ConfigError(f"unknown chat template {name!r}{closest(name, TEMPLATES)}")
    return TEMPLATES[name]


def unmarked(form: str) -> str:
    """Return the hash of a template without its generation marks and white space."""
    bare = re.sub(r"{%-?\s*(end)?generation\s*-?%}\s*", "", form)
    return hashlib.sha256("".join(bare.split()).encode()).hexdigest()


# Templates as their models' authors published them, by hash: the one above that says the same.
PUBLISHED = {
    "09412ee849c1f8482300fb58638096d7e8f009520567eb523f3d377db5c8c270": "qwen2.5",
    "88519bf74b59d633f433d87204654c703b4b87ca2ce1b9900ce10dfbfdf5e6cf": "qwen3",
    "12a35c22d5dfab7e04c8f3337406805d14bd5e6a335c8bda3930587e982efc5d": "qwen3-instruct",
    "065d2c5e13237e5dd6496260bfad0bc5aac7088317140d13c6e23373c61b64fc": "llama3",
    "8d6aff5a03f54ce8b8737daa3a558b688746670339c1416d866fba80619ad7cd": "llama3.1",
    "088f0b1cd4aab07e4c04b4a0afd8e4eb6571ec9362b4bb67aaba6cbd58849641": "llama3.2",
    "6adf0a2962ce871bf0b362295544962e2c7826e761fbedf627589385be6e08cf": "gemma",
    "7eea402f6a703ba8d7b3efc5b93ec0899a9c198e431aba82c0ceb7a0577806ab": "gemma",
}
TWINS = {unmarked(form): form for form, _ in TEMPLATES.values()} | {
    found: TEMPLATES[name][0] for found, name in PUBLISHED.items()
}
