"""Published defences against fine-tuning attacks, as transforms of a delta: what codecs are compared with."""
