"""Text to SQL over real tables: a small task that a small language model can learn in minutes.

    tables      real tables in one in-memory sqlite database; which of them are held out
    questions   six kinds of question: queries sampled from a table, put into words
    wordings    how each kind is asked, in training and in the held-out wordings
    build       training and test splits that share no gold SQL
    score       runs predicted SQL read-only and compares the rows with the gold query's
    hard        the hard set (joins, missing values, dates, HAVING): base, easy-trained and hard-trained models on it
    baseline    what is reached without training: the nearest question with the names swapped in

Everything here is the standard library and the data files of ``vega_datasets``; no model is known here.
"""
