"""A transformers model on this library: the same logits, the same greedy text, one graph for its forward."""

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from fusedonemoe.integrations.transformers import apply  # 1

# Random weights, so that nothing is downloaded; AutoModelForCausalLM.from_pretrained(...) works too.
CONFIG = Qwen3MoeConfig(
    hidden_size=64,
    moe_intermediate_size=32,
    num_experts=8,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    norm_topk_prob=True,
)


def main():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    prompt = torch.randint(CONFIG.vocab_size, (1, 12))
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        logits, text = model(prompt).logits, model.generate(prompt, **options)

    print(apply(model))  # 2
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, logits, rtol=1e-4, atol=1e-4)
        print("greedy text:", "the same" if torch.equal(model.generate(prompt, **options), text) else "another")

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # 3, where you leave the backend to torch
    out = compiled(prompt, labels=prompt, use_cache=False)
    out.loss.backward()
    print(f"loss {out.loss.item():.2f}, gradients for {sum(p.grad is not None for p in model.parameters())} parameters")


if __name__ == "__main__":
    main()
