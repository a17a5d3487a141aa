"""How chats begin: forms of questions and topics, and the start of a user's turn that the model writes itself."""

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
FORMS = (
    "What is {}?|Tell me about {}.|Explain {} in simple words.|Why is {} important?|Write a short story about {}.|"
    "Give me three facts about {}.|How would you describe {} to a child?|What is the history of {}?|"
    "Write a poem about {}.|What should a beginner know about {}?|Can you help me understand {}?|"
    "Write a letter to a friend about {}.|What are the good and the bad sides of {}?|"
    "List five questions that one could ask about {}.|Summarize what is known about {}."
).split("|")
TOPICS = (
    "the sun|the ocean|bread|friendship|the Roman Empire|photosynthesis|jazz|football|the human heart|volcanoes|"
    "science fiction|computer programming|the stock market|trains|painting|World War II|whales|cooking rice|the Moon|"
    "rock music|bridges|medieval castles|evolution|video games|hurricanes|children's books|democracy|tennis|metals|"
    "California|learning to read|sailing ships|mental health|birds|detective stories|gravity|chess|Paris|tea|winter|"
    "bees|the printing press|electricity|dreams|mathematics|gardens|dogs|money|sleep|the Internet|plants|glass|"
    "ancient Egypt|the brain|rivers|clocks|cheese|honesty|robots|maps|the weather|coffee|libraries|dinosaurs|China|"
    "teeth|bicycles|snow|salt|elections|airplanes|happiness|forests|the theatre|language|insects|wood|vaccines|"
    "a good breakfast|running|writing a résumé|saving money|climate change|black holes|sharks|Shakespeare"
).split("|")
SHORT = (
    "What is the capital of France?|How many days are there in a week?|Who wrote Romeo and Juliet?|Hello! How are you?|"
    "What is 2 + 3?|What color is the sky?|Name three fruits.|What do cows eat?|Translate 'good morning' into French.|"
    "How do I boil an egg?|What is your name?|Which planet is closest to the sun?|What is the opposite of hot?|"
    "Give me a recipe for pancakes.|How can I sleep better?|Recommend me a book.|Tell me a joke.|"
    "What is the largest animal?|How does a car engine work?|Write a sentence with the word 'river'.|Thank you!|"
    "What is the difference between a lake and a sea?|How long is a marathon?|Can fish breathe air?|Who was Einstein?"
).split("|")


def beginnings() -> list[str]:
    """Texts that a chat may begin with; in a third the question is left to the model, a third has a system prompt."""
    asked = [form.format(topic) for form in FORMS for topic in TOPICS] + SHORT * 10
    written = [USER + text + ASSISTANT for text in asked]
    return written + [USER] * len(written) + [SYSTEM + text for text in written]
