from unsloth import FastLanguageModel
