"""Load models, create a student, LoRA, memory of the teacher."""
