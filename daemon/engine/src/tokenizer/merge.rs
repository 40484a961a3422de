//! Merging neighbours, best first: the loop that byte-level BPE and SentencePiece share.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// No token, no neighbour.
pub const NONE: u32 = u32::MAX;

/// A stretch of the text that is, or may become, a token.
#[derive(Debug, Clone, Copy)]
pub struct Symbol {
    /// First byte.
    pub start: u32,
    /// One past its last byte; equal to `start` once a neighbour has taken it in.
    pub end: u32,
    /// The token that it is, or [`NONE`].
    pub id: u32,
    prev: u32,
    next: u32,
}

/// A merge that could be done: lower ranks first, then the leftmost.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    left: u32,
    /// Where the merged symbol would end. With `left` it says whether the merge is still there: a
    /// symbol only ever grows by whole neighbours.
    end: u32,
    id: u32,
}

/// Room for [`Merger::merge`], kept between pieces.
#[derive(Debug, Default)]
pub struct Merger {
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Reverse<Candidate>>,
}

impl Merger {
    /// Forgets the symbols of the last piece.
    pub fn clear(&mut self) {
        self.symbols.clear();
        self.heap.clear();
    }

    /// Adds a symbol after those already there.
    pub fn push(&mut self, start: u32, end: u32, id: u32) {
        let index = as_u32(self.symbols.len());
        if let Some(last) = self.symbols.last_mut() {
            last.next = index;
        }
        let prev = index.checked_sub(1).unwrap_or(NONE);
        self.symbols.push(Symbol { start, end, id, prev, next: NONE });
    }

    /// Merges until `pair` knows no more, then hands each symbol to `done`. `pair` gives the rank
    /// and the token of two neighbours. Time grows with n log n.
    pub fn merge(
        &mut self,
        pair: impl Fn(Symbol, Symbol) -> Option<(u32, u32)>,
        mut done: impl FnMut(Symbol),
    ) {
        for left in 0..as_u32(self.symbols.len()) {
            self.consider(left, &pair);
        }
        while let Some(Reverse(Candidate { left, end, id, .. })) = self.heap.pop() {
            let symbol = self.symbols[left as usize];
            let is_gone = symbol.start == symbol.end || symbol.next == NONE;
            if is_gone || self.symbols[symbol.next as usize].end != end {
                continue;
            }
            let right = &mut self.symbols[symbol.next as usize];
            right.end = right.start;
            let after = right.next;
            if after != NONE {
                self.symbols[after as usize].prev = left;
            }
            self.symbols[left as usize] = Symbol { end, id, next: after, ..symbol };
            if symbol.prev != NONE {
                self.consider(symbol.prev, &pair);
            }
            self.consider(left, &pair);
        }
        self.symbols.iter().filter(|s| s.start != s.end).for_each(|&symbol| done(symbol));
    }

    /// Puts the merge of the symbol `left` and the next on the heap, if there is one.
    fn consider(&mut self, left: u32, pair: &impl Fn(Symbol, Symbol) -> Option<(u32, u32)>) {
        let first = self.symbols[left as usize];
        if first.next == NONE {
            return;
        }
        let second = self.symbols[first.next as usize];
        if let Some((rank, id)) = pair(first, second) {
            self.heap.push(Reverse(Candidate { rank, left, end: second.end, id }));
        }
    }
}

/// A position in a text, or a count of its symbols.
pub fn as_u32(n: usize) -> u32 {
    u32::try_from(n).expect("texts come in frames of far less than 4 GiB")
}
