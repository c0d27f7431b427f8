"""BitNet b1.58 in JAX: models, training, and instruments that say whether a run collapses.

Each module imports only from those before it:

fields -> config -> config_file -> hosts -> presets -> metrics -> stopping -> cache -> metaspace
-> tokenizer -> documents -> corpus -> tokens -> data -> reference -> sharding -> quant
-> products -> model -> loss -> optim -> shrink -> forecast -> elsewhere -> collapse -> verdict
-> judging -> log -> train -> checkpoint -> hf_files -> hf_config -> hf_weights -> hf
-> gguf_vocab -> gguf -> program -> restore -> generate -> lm_eval -> subject -> updates
-> audit -> signatures -> causes -> checks -> inspection -> foreign -> history -> diagnosis
-> terminal -> charts -> page -> history_page -> workdir -> recorder -> run -> costs -> chips
-> shapes -> plan
"""
