//! What a VM may be called.

use crate::api::MAX_NAME;

/// Why a text is no VM name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is nothing.
    #[error("a VM name is not empty")]
    Empty,
    /// It is too long.
    #[error("a VM name has at most {MAX_NAME} characters, and this has {0}")]
    TooLong(usize),
    /// It has a character that names do not have.
    #[error("a VM name has letters, digits, '.', '_' and '-', and this has {0:?}")]
    BadCharacter(char),
    /// It could be taken for an option, or for what file systems hide.
    #[error("a VM name begins with a letter, a digit or '_', and this begins with {0:?}")]
    BadStart(char),
}

/// Checks a VM's name: ASCII letters, digits, `.`, `_` and `-`, 64 at most, and the first is neither `.` nor `-`.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if let Some(c) = name.chars().find(|&c| !allowed(c)) {
        return Err(NameError::BadCharacter(c));
    }
    match name.chars().next() {
        None => Err(NameError::Empty),
        Some(c @ ('.' | '-')) => Err(NameError::BadStart(c)),
        Some(_) if name.len() > MAX_NAME => Err(NameError::TooLong(name.len())),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for name in ["a", "base-1", "A.b_c-9", "_", "9.", &"x".repeat(64)] {
            assert_eq!(check_name(name), Ok(()), "{name}");
        }
        assert_eq!(check_name(""), Err(NameError::Empty));
        for (name, start) in [("--all", '-'), ("-", '-'), ("..", '.'), (".hidden", '.')] {
            assert_eq!(check_name(name), Err(NameError::BadStart(start)), "{name}");
        }
        assert_eq!(check_name("a/b"), Err(NameError::BadCharacter('/')));
        assert_eq!(check_name("a b"), Err(NameError::BadCharacter(' ')));
        assert_eq!(check_name("é"), Err(NameError::BadCharacter('é')));
        assert_eq!(check_name("a\nb").unwrap_err().to_string().lines().count(), 1);
        assert_eq!(check_name(&"x".repeat(65)), Err(NameError::TooLong(65)));
    }
}
