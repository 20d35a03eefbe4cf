"""halfbyte: quantize large language models after training, prove what it cost, run them fast."""
