//! The parsers against lines made up, by hand and at random.
