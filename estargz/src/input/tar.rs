//! The tar format.
