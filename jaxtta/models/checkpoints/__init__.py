"""Reading and writing checkpoints: transformers' and OpenCLIP's formats."""
