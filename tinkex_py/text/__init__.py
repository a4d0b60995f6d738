"""Text as tokens: the one place where prompts, answers and chats are encoded."""
