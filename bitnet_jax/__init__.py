"""BitNet b1.58 in JAX: models, training, and instruments that say whether a run collapses.

Each module imports only from those before it:

config -> config_file -> presets -> metrics -> cache -> tokenizer -> documents -> corpus
-> tokens -> data
-> reference -> quant -> products -> model -> loss -> optim -> shrink -> collapse -> verdict -> log
-> sharding -> train -> checkpoint -> hf_files -> hf_config -> hf_weights -> hf -> program
-> restore -> generate -> subject -> updates -> audit -> signatures -> causes -> checks
-> inspection -> terminal -> charts -> page -> workdir -> recorder -> run
"""
