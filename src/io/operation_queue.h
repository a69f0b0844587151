// First in, first out, linked through the operations themselves: queueing allocates nothing.
#pragma once

#include <utility>

#include "io/engine.h"

namespace tokendepot {

class OperationQueue {
 public:
  bool empty() const { return head_ == nullptr; }

  void push(IoOperation* operation) {
    operation->next = nullptr;
    (head_ == nullptr ? head_ : tail_->next) = operation;
    tail_ = operation;
  }

  /// Not on an empty queue.
  IoOperation* pop() {
    IoOperation* const first = head_;
    head_ = std::exchange(first->next, nullptr);
    return first;
  }

  /// Moves all of `other` behind what is here.
  void append(OperationQueue& other) {
    if (other.empty()) return;
    (head_ == nullptr ? head_ : tail_->next) = other.head_;
    tail_ = other.tail_;
    other.head_ = nullptr;
  }

 private:
  IoOperation* head_ = nullptr;
  IoOperation* tail_ = nullptr;  // meaningless while empty
};

}  // namespace tokendepot
