"""What is no part of the paper: settings, files, checkpoints, machine, tokenizers, other decoders, figures."""
