from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="google/gemma-7b",
    max_seq_length=4096,
    load_in_4bit=True,
)
