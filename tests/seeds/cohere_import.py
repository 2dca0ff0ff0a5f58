# Usually accessed through FastLanguageModel
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="CohereForAI/c4ai-command-r-plus",
    max_seq_length=4096,
    load_in_4bit=True,
)
# Cohere patches applied automatically
