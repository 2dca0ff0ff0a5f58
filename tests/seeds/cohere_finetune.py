from unsloth import FastLanguageModel

# Load with 4-bit quantization
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="CohereForAI/c4ai-command-r-v01",
    max_seq_length=4096,
    dtype=None,  # Auto-detect
    load_in_4bit=True,
)

# Add LoRA adapters
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj",
                    "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
)

# Train with SFTTrainer...
