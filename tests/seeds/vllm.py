from unsloth import FastLanguageModel

# Load with vLLM for fast inference
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Llama-3.2-1B-Instruct",
    max_seq_length=2048,
    load_in_4bit=True,
    fast_inference=True,  # Enable vLLM
    gpu_memory_utilization=0.6,
    max_lora_rank=64,
)

# Generate text with optimized inference
inputs = tokenizer("Hello, my name is", return_tensors="pt").to("cuda")
outputs = model.generate(**inputs, max_new_tokens=50)
print(tokenizer.decode(outputs[0]))
