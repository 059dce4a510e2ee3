"""Teacher and student: loading, making a student, LoRA, low memory."""
