"""The program: from settings to a fine-tuned model, its report and its privacy statement."""
