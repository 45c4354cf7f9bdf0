"""Does what reloads, merges, exports or serves an adapter behave as the model that was trained?"""
