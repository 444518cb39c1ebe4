"""What is not the paper: settings, files, checkpoints, machine, tokenizers, other decoders, figures."""
