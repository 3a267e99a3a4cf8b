//! Which pages of guest memory the VMM has written.

use crate::addr::PAGE_SHIFT;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

const WORD: usize = u64::BITS as usize;

/// One bit per page, and an index of the words that have any: a VMM writes little of a large guest, and what it wrote is
/// looked for while the guest stands still.
#[derive(Debug, Default)]
pub struct Written {
    pages: usize,
    words: Vec<AtomicU64>,
    /// Bit `n` of word `w`: word `64·w + n` is not empty, or was not a moment ago.
    index: Vec<AtomicU64>,
}

impl Written {
    /// Calls `each` with every word that is not empty, and its number (bit `n` of word `w` is page `64·w + n`), and clears
    /// them. What is written meanwhile counts now, or next time.
    pub fn take(&self, mut each: impl FnMut(usize, u64)) {
        for (at, index) in self.index.iter().enumerate() {
            if index.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut found = index.swap(0, Ordering::SeqCst);
            while found != 0 {
                let word = at * WORD + found.trailing_zeros() as usize;
                each(word, self.words[word].swap(0, Ordering::SeqCst));
                found &= found - 1;
            }
        }
    }
}

impl<'a> WithBitmapSlice<'a> for Written {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for Written {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let end = offset.saturating_add(len).div_ceil(1 << PAGE_SHIFT).min(self.pages);
        for page in offset >> PAGE_SHIFT..end {
            let word = page / WORD;
            self.words[word].fetch_or(1 << (page % WORD), Ordering::SeqCst);
            // After the word: whoever takes it in between leaves an entry of an empty word, and forgets nothing.
            self.index[word / WORD].fetch_or(1 << (word % WORD), Ordering::SeqCst);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset >> PAGE_SHIFT;
        page < self.pages && self.words[page / WORD].load(Ordering::SeqCst) >> (page % WORD) & 1 == 1
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for Written {
    fn with_len(len: usize) -> Self {
        let pages = len.div_ceil(1 << PAGE_SHIFT);
        let empty = |bits: usize| (0..bits.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let words = empty(pages);
        Self { pages, index: empty(words.len()), words }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_SIZE;

    fn taken(written: &Written) -> Vec<usize> {
        let mut pages = Vec::new();
        written
            .take(|word, bits| pages.extend((0..WORD).filter(|bit| bits >> bit & 1 == 1).map(|bit| word * WORD + bit)));
        pages
    }

    #[test]
    fn what_was_written_is_told_once() {
        let written = Written::with_len(10_000 * PAGE_SIZE);
        assert!(taken(&written).is_empty());
        written.mark_dirty(3 * PAGE_SIZE + 17, 1);
        written.mark_dirty(9000 * PAGE_SIZE - 1, 2);
        written.mark_dirty(5 * PAGE_SIZE, 0);
        assert!(written.dirty_at(3 * PAGE_SIZE) && !written.dirty_at(4 * PAGE_SIZE));
        assert_eq!(taken(&written), [3, 8999, 9000]);
        assert!(taken(&written).is_empty());
    }

    #[test]
    fn nothing_is_written_past_the_end() {
        let written = Written::with_len(70 * PAGE_SIZE);
        written.mark_dirty(69 * PAGE_SIZE, usize::MAX);
        written.slice_at(69 * PAGE_SIZE).mark_dirty(PAGE_SIZE, PAGE_SIZE);
        assert_eq!(taken(&written), [69]);
        assert!(!written.dirty_at(70 * PAGE_SIZE));
    }
}
