from unsloth import FastLanguageModel

# Load for full fine-tuning
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="meta-llama/Llama-3.2-1B",
    max_seq_length=2048,
    load_in_4bit=False,
    load_in_16bit=True,  # 16-bit for full finetuning
    full_finetuning=True,
)

# Model is ready for full parameter training
# Note: Requires significantly more GPU memory
