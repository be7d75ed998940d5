"""A small experiment, whole: four kinds of row, four kinds of budget, a sweep and a benchmark."""

EXPERIMENT = """
note = "words"
seeds = [0, 1]
eval_tokens = 512
[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 5
num_attention_heads = 2
num_key_value_heads = 1
max_position_embeddings = 64
[train]
context = 32
batch_tokens = 128
lr = 4e-3
dtype = "float32"
eval_tokens = 512
[sweep]
lrs = [2e-3, 4e-3]
share = 0.5
[[models]]
name = 'twin'
label = "vanilla twin"
[[models]]
name = 'rec3'
label = "fixed depth"
model = { num_recursions = 3 }
[[models]]
name = 'mor3'
label = "MoR-3"
model = { num_recursions = 3, router = 'expert_choice' }
[[models]]
name = 'random3'
label = "random router"
model = { num_recursions = 3, router = 'random' }
[[budgets]]
name = "same-flops"
same_flops = 4e8
[[budgets]]
name = "same-tokens"
same_tokens = 768
seeds = [0]
[[budgets]]
name = "per-param"
tokens_per_param = 0.1
models = ["twin", "mor3"]
seeds = [0]
[[budgets]]
name = "same-time"
same_time_s = 0.3
models = ["twin", "mor3"]
seeds = [0]
[[bench]]
name = "decode"
args = ['decode']
"""
