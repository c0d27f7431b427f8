"""BitNet b1.58 in JAX: models, training, and instruments that say whether a run collapses.

Each module imports only from those before it:

config -> presets -> metrics -> cache -> tokenizer -> documents -> corpus -> tokens -> data ->
reference -> quant -> model -> loss -> optim -> shrink -> collapse -> verdict -> sharding -> train
-> checkpoint -> hf -> program -> restore -> generate -> audit -> causes -> checks -> inspection ->
log -> charts -> page -> run
"""
