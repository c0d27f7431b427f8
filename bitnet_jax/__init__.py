"""BitNet b1.58 language models in JAX, with instruments that say whether training is collapsing.

Data flows one way; a module imports only from those before it:

config -> presets -> metrics -> tokenizer -> corpus -> data -> reference -> quant -> model
-> collapse -> loss -> optim -> shrink -> sharding -> train -> checkpoint -> hf
-> program -> restore -> generate -> subject -> updates -> audit -> signatures -> causes
-> checks -> inspection -> log -> charts -> report -> run
"""
