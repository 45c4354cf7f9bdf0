"""Do all ranks hold and apply the same?"""
