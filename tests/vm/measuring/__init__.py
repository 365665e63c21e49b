"""What `tests/vm/measure` is made of: what is measured (`plan`, `experiments/`), where (`rig`, `guest/`), and how it is told
(`document`, `picture`)."""
