"""llama.cpp's server in this process, as the xllamacpp package has it."""

import json
import urllib.request

import pytest


def serve(file, **settings):
    """Return llama.cpp's server over a file, everything in fp32 that can be."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
    params.cpuparams.n_threads = 1  # more of them spin while they wait for each other
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    for name, value in settings.items():
        setattr(params, name, value)
    return xllamacpp.Server(params)


def posted(server, path, **body):
    """Return the server's answer to a request that the package has no function for."""
    url, headers = f"{server.listening_address}/{path}", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
