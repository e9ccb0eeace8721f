"""The demo as a GGUF file: llama.cpp reads the same text and says the same, up to near-ties."""

import numpy as np
import pytest
import torch

from gangline.checkpoint.gguf_writer import write_gguf

QUESTION = "What is the capital of France?"
# Both compute in bf16, each in its own order: what one calls a lead of this much, the other may call none.
NEAR_TIE = 1.0


def test_llama_cpp_generates_the_same_text(demo, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_gguf(demo, tmp_path / "demo.gguf", type="bf16")
    tokenizer = AutoTokenizer.from_pretrained(demo)
    chat = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16)
    told = model.generate(
        ids, max_new_tokens=16, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = told.sequences[0, ids.shape[1] :].tolist()
    llama = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids[0].tolist()
    llama.eval(ids[0].tolist() + tokens)
    theirs = np.array(llama.scores[ids.shape[1] - 1 :][: len(tokens)])
    leads = []
    for step, token in enumerate(tokens):
        best, second = told.logits[step][0].float().topk(2).values.tolist()
        assert int(theirs[step].argmax()) == token or best - second < NEAR_TIE
        leads.append(best - second)
    assert sum(lead >= NEAR_TIE for lead in leads) > len(leads) // 2
