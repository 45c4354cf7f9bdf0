"""Are the values what they should be?"""
