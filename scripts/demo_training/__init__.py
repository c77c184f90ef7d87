"""What makes the demo checkpoint: drawn pictures, questions, text, tokenizer, batches, model and training loop."""
