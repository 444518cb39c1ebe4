"""What keeps the results honest and is no part of the paper: settings, files, checkpoints, machine, other decoders."""
